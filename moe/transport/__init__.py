"""How calls travel. The only code that opens connections."""

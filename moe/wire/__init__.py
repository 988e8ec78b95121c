"""What a call looks like as bytes. No sockets, no clocks: those live in ``moe.transport``."""

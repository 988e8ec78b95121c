"""The command line: ``hivemind-server`` (also ``moe-server``) and ``moe-status``. Imports nothing heavy."""

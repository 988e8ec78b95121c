"""The serving side: backends, pools, the Runtime, the handler and the Server that holds them together."""

"""A server compared with the engine: what both are asked, how a server is asked, how answers compare, and the words."""

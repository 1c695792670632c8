"""The engine over HTTP: the app, and the contract with clients that poll. Nothing that the terminal needs."""

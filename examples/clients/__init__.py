"""Clients of a server with sparse attention that need nothing of this project."""

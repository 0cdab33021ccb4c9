"""Serve running graphs over HTTP, by the interface of OpenAI."""

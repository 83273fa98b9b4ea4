"""Servers elsewhere whose models are served beside those of this machine, for who started this server to choose.

spec.py      ProviderSpec: name, URL, where the key is
remote.py    Provider: its HTTP client, its list of models, and what it answers; Providers: all of a server
relay.py     from a request to the provider's answer, with the model's name put back
"""

"""OpenAI's API: a module for each path."""

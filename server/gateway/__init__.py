"""The same routes and strategies with no engine here: over the HTTP of vLLM servers elsewhere."""

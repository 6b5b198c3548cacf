"""Everything that touches vLLM, pinned to 0.32."""

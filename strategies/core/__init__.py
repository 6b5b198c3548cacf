"""The nouns and rules that every strategy shares."""

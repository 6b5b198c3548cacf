"""HTTP routes of our own, thin over the rest."""

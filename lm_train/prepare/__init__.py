"""Text prepared once: cleaned, without duplicates, tokenised, in shards. Free of torch."""

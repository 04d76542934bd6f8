"""Is this tree slower, hungrier or different from another? Both measured side by side, or from records that are stored."""

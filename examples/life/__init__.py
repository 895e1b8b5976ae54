"""Networks and data that the example recipes name."""

"""What several tests need: tiny models, a hub of their own, runs started and watched. No test lies here."""

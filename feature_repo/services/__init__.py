"""Real PostgreSQL and Redis servers on loopback, for a profile whose stores have no address."""

"""Open ways to the agent."""

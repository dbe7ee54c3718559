"""From prompts to rollouts, from rollouts to scores: samplers, teachers, servers, and the runs that use them."""

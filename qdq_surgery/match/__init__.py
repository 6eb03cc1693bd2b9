"""Rules x graphs -> plan. Reads only."""

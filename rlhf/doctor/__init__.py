"""Is this PPO what it says it is? Checks of the first iterations by other means than their own programs."""

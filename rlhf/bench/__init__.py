"""Layouts measured against each other, and against what is predicted of them: `glm-jax bench`."""

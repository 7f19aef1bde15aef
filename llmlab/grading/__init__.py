"""Checks that labs run on a student's answers, and what carries their outcome into nbgrader."""

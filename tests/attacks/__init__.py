"""Attacks on the grader, as data: what is handed in, what must come of it, and the control that shows that it bites."""

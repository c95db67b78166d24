"""``mlorq doctor``: what an installation has, what answers, and what a configuration needs."""

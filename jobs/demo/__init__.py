"""The demo: ten teachers, one cache and many students on embedded digits, in about a minute."""

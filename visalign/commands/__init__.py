"""The work behind each command of ``visalign.cli``; together with ``build`` the only place where leaves meet."""

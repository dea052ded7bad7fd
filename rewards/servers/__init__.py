"""What every client of a server needs: ``transport`` (one HTTP call under a deadline), ``replicas`` (which of several equal servers is
next), ``calls`` (retries, failover, many requests at once) and ``cache`` (answers on disk by content). Judges and remote rewards use it.
"""

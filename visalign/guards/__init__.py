"""How reward hacking is seen and stopped: what media are like, how they differ, what falls while the reward rises.

    observe.py    numbers about media that no reward has to be asked for, and how different they are
    drift.py      how far the policy has moved from its reference
    rule.py       when a fall is more than noise, and which evaluation was the best
    alarm.py      why a run ended
    watch.py      the loop's guards: all of these over a run
"""

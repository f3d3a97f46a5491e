"""The one lock over what threads share: bindings, derived tensors, released weights.

A child process that was forked has one thread only. A lock that another thread held at that moment
stays locked in the child for good, over data that are half changed. So a fork waits until no other
thread holds this one; and since there is only one, no two threads wait for each other's.
"""

import os
import threading

lock = threading.RLock()
"""Held while bindings and what follows from weights change; not by a call that changes nothing."""

os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)

"""The systems that `benchmarks/queue.py` compares, each a module with the same functions:

``name``; ``submit(n)``, ``submit_many(n)`` or None; ``one()`` submits a job and waits for its result;
``submit_url(n)`` submits jobs with a URL and a small dict; ``remaining(client)`` counts unfinished jobs;
``command(processes, threads)`` starts workers; ``occupy(seconds, n)`` submits long jobs, or None.

``share`` (optional) is the part of the jobs that a slow system drains. They read the server's address from
``BENCH_URL``, so that worker processes find it too.
"""

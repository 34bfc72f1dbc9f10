"""The fault harness: a real service under a seeded schedule of faults, and a checker that shares no code with it.

`python -m tests.faults --seeds 20` runs it; `--seed S` runs one schedule again. The folder's files:

- `app.py`: the app that is run. `places.py`, `proxy.py`: servers, databases, the service's processes, the network.
- `schedule.py`: chooses the faults from a seed. `faults.py`: injects and heals each of them.
  Among them are killed workers onto long histories, a bad deploy that is rolled back, a restored log, and requests
  that would have the service publish for others. Some seeds have 4 workers on PostgreSQL, some take a snapshot every 7
  events.
- `clients.py`: the load, and the answers that each sender got.
- `rules.py`, `checker.py`: the domain once more, as plain functions; the conditions on log, tables and answers.
- `evidence.py`: reads log, tables and leftovers with nats-py and SQL. `ending.py`: how a run ends and is checked.
- `driver.py`, `report.py`: one run; the table.
- `cluster_run.py`, `cluster_faults.py`, `gaps.py`: the same on a cluster of three servers (`make cluster-faults`).

Nothing in `rules.py`, `checker.py` and `evidence.py` imports the product.
"""

"""What reads runs and shows: evaluation, reports, pictures, pages, the checks against the optimum and float64.

Entry points: the modules' `main`; `python -m minirlhf.NAME` runs them, `minirlhf` lists them.

May be imported by: scripts. Imports: everything.
"""

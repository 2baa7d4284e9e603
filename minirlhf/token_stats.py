"""`python -m minirlhf.token_stats`; the code is in model/token_stats.py (the op) and commands/certificate.py."""

from minirlhf.model.token_stats import TokenStats, linear_token_stats, token_stats, token_stats_reference  # noqa: F401

if __name__ == "__main__":
    from minirlhf.commands.certificate import main

    main()

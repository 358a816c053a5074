"""The group of commands ``longtrail lm``."""

import click

from encoders.lm import cli_corpus, cli_evaluate, cli_pretrain, cli_tokenizer, cli_tune

lm = click.Group(
    "lm",
    short_help="An own language model: corpus, tokenizer, pretraining, tuning, evaluation.",
    help="""Make an own language model of the data set's text, small on two cores or large on GPUs.

    \b
    Example:
      longtrail ingest feature_repo/datasets/online_retail.toml
      longtrail lm tokenizer
      longtrail lm pretrain --recipe tiny
      longtrail lm average
      longtrail lm tune
      longtrail lm evaluate
    """,
)
for module in (cli_corpus, cli_tokenizer, cli_pretrain, cli_tune, cli_evaluate):
    for command in module.commands:
        lm.add_command(command)

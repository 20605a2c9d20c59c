"""`llamax data`: build, look at, join and check data, train a tokenizer."""

from __future__ import annotations

import argparse
from typing import Any

from llamax.cli import curate
from llamax.cli.words import command, count, examples, named, sentence

# ------------------------------------------------------------------------------------------------------ the handlers


def _data_build(args: argparse.Namespace) -> None:
    from llamax.data.embedded.build import Recipe, build

    build(args.out, recipe=Recipe(seed=args.seed), force=args.force)


def _data_show(args: argparse.Namespace) -> None:
    from llamax import config
    from llamax.data.show import show

    if not args.recipe:
        show(args.manifest, n=args.documents)
        return
    run = config.freeze(config.load(args.recipe))
    show(args.manifest, n=args.documents, tokenizer=run.data.tokenizer, vision=run.model.vision, data=run.data)


def _data_join(args: argparse.Namespace) -> None:
    from llamax import config
    from llamax.data.join import join

    tokenizer = config.resolve_path(args.tokenizer)
    written = join(args.manifest, args.by, args.out, args.max_tokens, tokenizer)
    print(f"{args.out} has {written['documents']:,} documents of {written['tokens']:,} tokens in all.")


def _data_verify(args: argparse.Namespace) -> None:
    from llamax.data.sources import read_manifest, verify

    manifest = read_manifest(args.manifest)
    verify(manifest)
    print(f"{len(manifest.files)} files are what {args.manifest} says.")


def _data_tokenizer(args: argparse.Namespace) -> None:
    from llamax.data.train_tokenizer import train_tokenizer

    train_tokenizer(args.out, args.vocab, args.seed)


# -------------------------------------------------------------------------------------------------------- the parser


def add(commands: Any) -> None:
    """The words of `llamax data`."""
    about = "build or look at data, train a tokenizer; grade, choose and draw conversations"
    data = commands.add_parser("data", help=about, description=sentence(about), **examples(DATA))
    verbs = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    build = command(verbs, "build", _data_build, "make the embedded data: this Python's library, and drawings", BUILD)
    build.add_argument("--out", default="data/built", metavar="DIR", help="the folder to fill (%(default)s)")
    build.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawings (%(default)s)")
    build.add_argument("--force", action="store_true", help="build again even if it is there")
    look = command(verbs, "show", _data_show, "print some documents of a file, with their pictures", DATA_SHOW)
    look.add_argument("manifest", metavar="FILE", help="a manifest (.toml), or a .jsonl file of documents")
    look.add_argument("-n", "--documents", type=count, default=3, metavar="N", help="how many (%(default)s)")
    about = "join related documents into long ones: the files of a folder, or a module and what imports it"
    joined = command(verbs, "join", _data_join, about, JOIN)
    joined.add_argument("manifest", metavar="MANIFEST", help="a .toml file of documents whose ids are their paths")
    joined.add_argument("--by", required=True, choices=("folder", "imports"), help="what belongs together")
    joined.add_argument("--out", required=True, type=named, metavar="FILE", help="the manifest to write (.toml)")
    most = "of a joined document, by --tokenizer (%(default)s)"
    joined.add_argument("--max-tokens", type=int, default=65_536, metavar="N", help=most)
    joined.add_argument("--tokenizer", default="data/tokenizer.model", metavar="FILE", help="(%(default)s)")
    whose = "its tokenizer and its pictures' tiles are those that tasks are made for"
    look.add_argument("--recipe", default="", metavar="RECIPE", help=f"{whose} (the small tokenizer, Llama 4's tiles)")
    verify = command(verbs, "verify", _data_verify, "compare a manifest's files with its hashes", VERIFY)
    verify.add_argument("manifest", metavar="MANIFEST", help="a .toml file with a [sha256] table")
    tokenizer = command(
        verbs, "tokenizer", _data_tokenizer, "train the small tokenizer on the embedded data", TOKENIZER
    )
    tokenizer.add_argument(
        "--out", default="data/tokenizer.model", metavar="FILE", help="the file to write (%(default)s)"
    )
    tokenizer.add_argument(
        "--vocab", type=int, default=3968, metavar="N", help="ids without the specials (%(default)s)"
    )
    tokenizer.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawings' words (%(default)s)")
    curate.add(verbs)


DATA = """
    llamax data build
    llamax data show data/built/drawings.toml
"""
BUILD = """
    llamax data build
    llamax data build --out /tmp/built --seed 1
"""
DATA_SHOW = """
    llamax data show data/built/drawings.toml
    llamax data show data/built/python.toml -n 1
"""
JOIN = """
    llamax data join data/built/python.toml --by folder --out data/packages.toml
    llamax data join data/built/python.toml --by imports --out data/callers.toml --max-tokens 16384
"""
VERIFY = """
    llamax data verify data/built/python.toml
"""
TOKENIZER = """
    llamax data tokenizer --out data/tokenizer.model --vocab 3968
"""

"""`regrad questions`: training data from a corpus that has no questions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from regrad_vllm.arguments import server_url, whole
from regrad_vllm.cli.ingest import note_mended
from regrad_vllm.client.corpus import ENDINGS, CorpusDocument, find_files, read_corpus
from regrad_vllm.console import CommandError, UsageError, count, note, say


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("questions", help="questions for a corpus, written by a model that you serve")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=f"{', '.join(ENDINGS)} files, or folders")
    parser.add_argument(
        "--server", type=server_url, required=True, metavar="URL", help="an OpenAI-compatible server, http://host:port"
    )
    parser.add_argument("--model", required=True, help="a model there that follows instructions")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for `regrad train --data`")
    parser.add_argument("--set", default="corpus", metavar="NAME", help="the set's name in configs (%(default)s)")
    parser.add_argument("--per-passage", type=whole(1), default=5, help="questions to ask for (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Cuts the corpus into passages, as `regrad ingest` does, and asks for questions about every passage."""
    import asyncio

    from regrad_vllm.data.from_corpus import write_questions
    from regrad_vllm.data.questions import SourceDocument

    if args.out.exists() and any(args.out.iterdir()):
        raise UsageError(f"{args.out} must be absent or an empty folder; choose another")
    files, _, bad = find_files(args.paths)
    documents = []
    mended: dict[str, int] = {}
    for item in read_corpus(files):
        if isinstance(item, CorpusDocument):
            documents.append(SourceDocument(item.id, item.title, item.text, args.set))
            if item.num_mended:
                mended[item.place] = item.num_mended
        else:
            bad.append(item)
    if bad:
        raise UsageError(f"{count(len(bad), 'input')} can't be used, the first: {bad[0]}; mend or leave them out")
    note_mended(mended)
    work = write_questions(documents, args.server, args.model, args.out, per_passage=args.per_passage)
    outcome = asyncio.run(work)
    for failure in outcome.failures[:3]:
        note(failure)
    say(
        f"{args.out}: {count(outcome.num_questions, 'question')} about {count(outcome.num_passages, 'passage')}; "
        f"{outcome.num_refused} more were not usable"
    )
    if outcome.failures:
        raise CommandError(f"{count(len(outcome.failures), 'passage')} got no answer from {args.server}")
    return 0

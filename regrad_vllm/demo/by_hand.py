"""The commands that repeat the demo by hand."""

from __future__ import annotations

from bank_service.wire.ports import DEFAULT_BANK
from regrad_vllm.console import say

_COMMANDS = f"""
Go on by hand, from this folder. Three terminals, or & behind the first two:

  . .venv/bin/activate
  regrad bank
  regrad serve default --served-model-name smollm2 --regrad-documents write --host 127.0.0.1 --port 8000

  regrad ingest regrad_vllm/demo/data/documents/invented.jsonl
  regrad query "Who commands the Quilegren?"

  curl -s http://localhost:8000/v1/chat/completions -H 'content-type: application/json' -d \\
    '{{"model": "smollm2-regrad", "messages": [{{"role": "user", "content": "Who commands the Quilegren?"}}],
    "temperature": 0}}'

  python - <<'END'
  from openai import OpenAI
  client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
  answer = client.chat.completions.create(
      model="smollm2",
      messages=[{{"role": "user", "content": "Who commands the Quilegren?"}}],
      temperature=0,
      extra_body={{"regrad": {{"top_k": 1}}}},
  )
  print(answer.choices[0].message.content, answer.model_extra["regrad"]["documents"])
  END

  python - <<'END'
  from regrad_vllm.client import Bank
  bank = Bank("{DEFAULT_BANK}")
  for hit in bank.query("Who commands the Quilegren?").hits:
      print(hit.id, hit.version, hit.score)
  END
"""


def show() -> None:
    say(_COMMANDS)

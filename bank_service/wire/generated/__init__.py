"""Made by ``python -m bank_service.wire.generate``; never edited."""

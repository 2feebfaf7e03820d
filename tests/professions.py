"""The question that most tests ask: its classes and templates."""

from lib import questions

QUESTION = questions.load("professions")
SUPERSETS, TEMPLATES = QUESTION.supersets, QUESTION.texts

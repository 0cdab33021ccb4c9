"""Answer in the forms of OpenAI's interface: what a body asks for, and what becomes of the tokens."""

"""Executing programs. A backend is one file and sees nothing but programs and graphs."""

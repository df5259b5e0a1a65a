"""Stages and curricula: settings that change while a run goes on."""

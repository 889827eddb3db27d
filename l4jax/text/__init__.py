"""The host side of a prompt: text and pictures to token ids and tiles, token ids back to text."""

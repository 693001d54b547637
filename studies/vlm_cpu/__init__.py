"""Two tiny VLMs on rendered scenes: what is asked, when, and how well one sees. README.md has the answers."""

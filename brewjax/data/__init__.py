"""From a company's tables to training batches, in five rooms, lowest first: `tables`, `text`, `tasks`, `prompts` and
`records`. A room imports only from itself and from rooms before it."""

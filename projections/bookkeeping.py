"""Statements on the kernel's own tables that take one JSON parameter for many rows."""

ADVANCE = {
    "sqlite": """
        UPDATE eskernel_checkpoint SET sequence = given.value->>4
        FROM json_each(:moves) AS given
        WHERE projection = given.value->>0 AND generation = given.value->>1 AND partition = given.value->>2
          AND sequence = given.value->>3 AND epoch = :epoch""",
    "postgresql": """
        WITH moves AS MATERIALIZED (SELECT given FROM jsonb_array_elements(CAST(:moves AS jsonb)) AS given),
        locked AS MATERIALIZED (
          SELECT projection, generation, partition FROM eskernel_checkpoint
          WHERE (projection, generation, partition) IN (
            SELECT given->>0, CAST(given->>1 AS int), CAST(given->>2 AS int) FROM moves)
          ORDER BY projection COLLATE "C", generation, partition FOR UPDATE)
        UPDATE eskernel_checkpoint SET sequence = CAST(given->>4 AS bigint)
        FROM locked JOIN moves ON locked.projection = given->>0 AND locked.generation = CAST(given->>1 AS int)
          AND locked.partition = CAST(given->>2 AS int)
        WHERE eskernel_checkpoint.projection = locked.projection
          AND eskernel_checkpoint.generation = locked.generation
          AND eskernel_checkpoint.partition = locked.partition
          AND sequence = CAST(given->>3 AS bigint) AND epoch = :epoch""",
}
"""Moves checkpoints that stand where they should, under the owner's epoch. On PostgreSQL it locks them in the order in
which a claim and a cut-over do."""
KEEP = {
    "sqlite": """
        INSERT INTO eskernel_sequence (projection, generation, aggregate_id, sequence)
        SELECT :projection, :generation, value->>0, value->>1 FROM json_each(:kept) WHERE true
        ON CONFLICT (projection, generation, aggregate_id) DO UPDATE SET sequence = excluded.sequence""",
    "postgresql": """
        INSERT INTO eskernel_sequence (projection, generation, aggregate_id, sequence)
        SELECT :projection, :generation, given->>0, CAST(given->>1 AS bigint)
        FROM jsonb_array_elements(CAST(:kept AS jsonb)) AS given
        ON CONFLICT (projection, generation, aggregate_id) DO UPDATE SET sequence = excluded.sequence""",
}
"""Stores the sequences of aggregates without a row."""
KEPT = {
    "sqlite": """
        SELECT aggregate_id, sequence FROM eskernel_sequence WHERE projection = :projection
        AND generation = :generation AND aggregate_id IN (SELECT value FROM json_each(:ids))""",
    "postgresql": """
        SELECT aggregate_id, sequence FROM eskernel_sequence WHERE projection = :projection
        AND generation = :generation
        AND aggregate_id IN (SELECT value FROM json_array_elements_text(CAST(:ids AS json)))""",
}
"""Returns those sequences."""

"""The views that show the live generations: replaced with all that others have hung on them, and refused to writers.

PostgreSQL keeps grants, comments and dependent views when a view is replaced, but it replaces a view only if the old
columns are still there, with their types and in their order. Otherwise the view is dropped and made again, with its
grants and comments, unless other objects depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Table, text

from projections.errors import SchemaError
from projections.naming import quoted

REFUSE = "eskernel_refuse_write"
"""The function of the triggers that refuse writes (PostgreSQL)."""
_READ_ONLY = "eskernel_read_only"
_TRIGGERS = {
    _READ_ONLY: "INSTEAD OF INSERT OR UPDATE OR DELETE ON {view} FOR EACH ROW",
    # the other one is never called for a statement that concerns no row
    f"{_READ_ONLY}_statement": "BEFORE INSERT OR UPDATE OR DELETE ON {view} FOR EACH STATEMENT",
}
READ_ONLY = (
    "is a view of a projection, and only the kernel writes its tables; in an Sql handler, use tx.table(Model) instead "
    "of the model or its table's name"
)
_FUNCTION = f"""
CREATE FUNCTION {REFUSE}() RETURNS trigger LANGUAGE plpgsql AS $body$
BEGIN
    RAISE EXCEPTION '% %', TG_TABLE_NAME, $text${READ_ONLY}$text$;
END $body$"""
_FIND = """
SELECT c.oid, c.relkind FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname = :name AND n.nspname = COALESCE(CAST(:schema AS text), current_schema())"""
_COLUMNS = """
SELECT attname, format_type(atttypid, atttypmod), attcollation FROM pg_attribute
WHERE attrelid = :oid AND attnum > 0 AND NOT attisdropped ORDER BY attnum"""
_DEPENDENTS = """
SELECT DISTINCT CASE WHEN d.classid = 'pg_rewrite'::regclass THEN
    (SELECT pg_describe_object('pg_class'::regclass, r.ev_class, 0) FROM pg_rewrite r WHERE r.oid = d.objid)
    ELSE pg_describe_object(d.classid, d.objid, d.objsubid) END
FROM pg_depend d
WHERE d.deptype = 'n' AND (
    (d.refclassid = 'pg_class'::regclass AND d.refobjid = :oid)
    OR (d.refclassid = 'pg_type'::regclass
        AND d.refobjid IN (SELECT oid FROM pg_type t WHERE t.typrelid = :oid
            OR t.typelem IN (SELECT oid FROM pg_type e WHERE e.typrelid = :oid AND e.typarray = t.oid)))
) AND NOT (d.classid = 'pg_rewrite'::regclass
    AND d.objid IN (SELECT oid FROM pg_rewrite WHERE ev_class = :oid)
) AND NOT (d.classid = 'pg_constraint'::regclass
    AND d.objid IN (SELECT oid FROM pg_constraint WHERE conrelid = ANY(:own))
) AND NOT (d.classid = 'pg_attrdef'::regclass
    AND d.objid IN (SELECT oid FROM pg_attrdef WHERE adrelid = ANY(:own))) ORDER BY 1"""
_HUNG_ON = """
SELECT format('GRANT %s ON %s TO %s%s', g.privilege_type, CAST(:view AS text),
    CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(g.grantee)) END,
    CASE WHEN g.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
FROM pg_class c, aclexplode(c.relacl) g WHERE c.oid = :oid AND g.grantee <> c.relowner
UNION ALL
SELECT format('GRANT %s (%I) ON %s TO %s%s', g.privilege_type, a.attname, CAST(:view AS text),
    CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(g.grantee)) END,
    CASE WHEN g.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid, aclexplode(a.attacl) g
WHERE c.oid = :oid AND NOT a.attisdropped AND a.attname = ANY(:kept)
UNION ALL
SELECT format('COMMENT ON VIEW %s IS %L', CAST(:view AS text), description) FROM pg_description
WHERE classoid = 'pg_class'::regclass AND objoid = :oid AND objsubid = 0
UNION ALL
SELECT format('COMMENT ON COLUMN %s.%I IS %L', CAST(:view AS text), a.attname, description)
FROM pg_description JOIN pg_attribute a ON a.attrelid = objoid AND a.attnum = objsubid
WHERE classoid = 'pg_class'::regclass AND objoid = :oid AND a.attname = ANY(:kept)
UNION ALL
SELECT pg_get_ruledef(oid) FROM pg_rewrite WHERE ev_class = :oid AND rulename <> '_RETURN'
UNION ALL
SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = :oid AND NOT tgisinternal AND NOT tgname = ANY(:own)
UNION ALL
SELECT format('ALTER VIEW %s OWNER TO %I', CAST(:view AS text), pg_get_userbyid(relowner)) FROM pg_class
WHERE oid = :oid AND pg_get_userbyid(relowner) <> current_user"""


@dataclass(frozen=True, slots=True)
class View:
    """The name of a view: the table name of a model.

    Attributes:
        schema: the model's schema, None for the connection's own.
    """

    schema: str | None
    name: str

    @property
    def sql(self) -> str:
        """The quoted name."""
        return quoted(self.schema, self.name)

    def __str__(self) -> str:
        return self.name if self.schema is None else f"{self.schema}.{self.name}"


def execute(connection: Connection, statement: str) -> None:
    """Execute a statement whose names are quoted already; a percent sign in them has no meaning."""
    connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def exists(connection: Connection, view: View) -> bool:
    """Return whether there is a view of this name.

    Raises:
        SchemaError: something else has the name.
    """
    if connection.dialect.name == "postgresql":
        found = connection.execute(text(_FIND), {"schema": view.schema, "name": view.name}).first()
        kind = None if found is None else "view" if found.relkind == "v" else "table"
    else:
        query = text("SELECT type FROM sqlite_master WHERE lower(name) = lower(:name)")
        kind = connection.scalar(query, {"name": view.name})
    if kind not in (None, "view"):
        raise SchemaError(
            f"a {kind} named {view} exists, and the kernel did not create it, but the projection's view needs this "
            f"name; rename or drop the {kind}"
        )
    return kind == "view"


def check_schema(connection: Connection, view: View) -> None:
    """Raise `SchemaError` if the view's schema does not exist."""
    if view.schema is None or connection.dialect.name != "postgresql":
        return
    query = text("SELECT 1 FROM pg_namespace WHERE nspname = :name")
    if connection.scalar(query, {"name": view.schema}) is None:
        raise SchemaError(
            f"the schema of the table {view} does not exist; create it with CREATE SCHEMA {quoted(view.schema)}"
        )


def replace(connection: Connection, view: View, physical: Table, shown: Sequence[str]) -> None:
    """Make the view show these columns of a table, with its grants, its comments, and what was built on it.

    Raises:
        SchemaError: other objects depend on columns that the table does not have, or something has the view's name.
    """
    there = exists(connection, view)
    if connection.dialect.name != "postgresql":
        _replace_on_sqlite(connection, view, there, _definition(view, shown, physical))
        return
    if not there:
        execute(connection, f"CREATE VIEW {_definition(view, shown, physical)}")
        protect(connection, view)
        return
    oid = _oid(connection, view)
    _let_owner_read(connection, oid, physical)
    options = connection.scalar(
        text("SELECT array_to_string(reloptions, ', ') FROM pg_class WHERE oid = :o"), {"o": oid}
    )
    order = _replaceable(connection, view, oid, physical, shown)
    if order is not None:
        execute(connection, f"CREATE OR REPLACE VIEW {_definition(view, order, physical, options)}")
    else:
        parameters = {"oid": oid, "view": view.sql, "kept": list(shown), "own": list(_TRIGGERS)}
        hung = list(connection.scalars(text(_HUNG_ON), parameters))
        execute(connection, f"DROP VIEW {view.sql}")
        execute(connection, f"CREATE VIEW {_definition(view, shown, physical, options)}")
        for statement in hung:
            execute(connection, statement)
    protect(connection, view)


def _definition(view: View, shown: Sequence[str], physical: Table, options: str | None = None) -> str:
    columns = ", ".join(map(quoted, shown))
    having = f" WITH ({options})" if options else ""
    return f"{view.sql}{having} AS SELECT {columns} FROM {quoted(physical.schema, physical.name)}"


def _replace_on_sqlite(connection: Connection, view: View, there: bool, definition: str) -> None:
    # views on this view look it up when they are used; only triggers go with it
    hung = _sqlite_triggers(connection, view, own=False) if there else []
    execute(connection, f"DROP VIEW IF EXISTS {view.sql}")
    execute(connection, f"CREATE VIEW {definition}")
    for statement in hung:
        execute(connection, statement)
    protect(connection, view)


def _sqlite_triggers(connection: Connection, view: View, *, own: bool) -> list[str]:
    """Return the definitions of the kernel's triggers on a view, or of those of others."""
    query = f"""SELECT sql FROM sqlite_master WHERE type = 'trigger' AND lower(tbl_name) = lower(:name)
        AND substr(name, 1, {len(_READ_ONLY)}) {"=" if own else "<>"} '{_READ_ONLY}'"""
    return list(connection.scalars(text(query), {"name": view.name}))


def _let_owner_read(connection: Connection, oid: int | None, physical: Table) -> None:
    """If the view was given to another role, let that role read the new table: a view reads with its owner's rights."""
    query = (
        "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = :oid AND pg_get_userbyid(relowner) <> current_user"
    )
    if owner := connection.scalar(text(query), {"oid": oid}):
        execute(connection, f"GRANT SELECT ON {quoted(physical.schema, physical.name)} TO {quoted(owner)}")


def _oid(connection: Connection, view: View) -> int | None:
    found: int | None = connection.scalar(text(_FIND), {"schema": view.schema, "name": view.name})
    return found


def _replaceable(
    connection: Connection, view: View, oid: int | None, physical: Table, shown: Sequence[str]
) -> list[str] | None:
    """Return the order of columns in which the view can be replaced, or None if it must be dropped first.

    Raises:
        SchemaError: it must be dropped first, and other objects depend on it.
    """
    old = [tuple(row) for row in connection.execute(text(_COLUMNS), {"oid": oid})]
    table = _oid(connection, View(physical.schema, physical.name))
    types = {row[0]: tuple(row) for row in connection.execute(text(_COLUMNS), {"oid": table})}
    names = [row[0] for row in old]
    replaceable = all(row[0] in shown and types.get(row[0]) == row for row in old)
    if replaceable and names == list(shown[: len(names)]):
        return list(shown)
    found = dependents(connection, view)
    if not found:
        return None
    if replaceable:
        # what depends on the view goes before the order of its columns
        return [*names, *(name for name in shown if name not in names)]
    gone = [name for name in names if name not in shown]
    changed = [row[0] for row in old if row[0] in shown and types[row[0]] != row]
    lost = [f"loses {', '.join(gone)}"] if gone else []
    lost += [f"{name} becomes {types[name][1]}" for name in changed]
    raise SchemaError(
        f"the view {view} can't be replaced: it {' and '.join(lost)}, and these depend on it: {', '.join(found)}. "
        "Drop them and make them again afterwards, or keep the columns and their types, and add new ones"
    )


def dependents(connection: Connection, relation: View, among: Sequence[View] = ()) -> list[str]:
    """Return what others have built on a view or a table, such as `view rich`.

    On SQLite nothing hinders a view's replacement.

    Args:
        among: tables whose own constraints don't count.
    """
    if connection.dialect.name != "postgresql":
        return []
    own = [_oid(connection, name) for name in (relation, *among)]
    return list(connection.scalars(text(_DEPENDENTS), {"oid": own[0], "own": own}))


def check_replaceable(connection: Connection, view: View, physical: Table, shown: Sequence[str]) -> None:
    """Raise the error that `replace` would raise for this table, and change nothing."""
    if exists(connection, view) and connection.dialect.name == "postgresql":
        _replaceable(connection, view, _oid(connection, view), physical, shown)


def check_droppable(connection: Connection, view: View, why: str) -> None:
    """Raise `SchemaError` if other objects depend on a view that is to be dropped."""
    if found := dependents(connection, view):
        raise SchemaError(f"the view {view} can't be dropped, and {why}; these depend on it: {', '.join(found)}")


def drop(connection: Connection, view: View, is_ours: Callable[[str], bool]) -> None:
    """Drop a view if it exists and shows a table of which `is_ours` says so."""
    shown = shows(connection, view)
    if shown is not None and is_ours(shown):
        execute(connection, f"DROP VIEW {view.sql}")


def shows(connection: Connection, view: View) -> str | None:
    """Return the name of the table that a projection's view shows, or None if there is no such view."""
    if connection.dialect.name == "postgresql":
        query = """
            SELECT t.relname FROM pg_rewrite r
            JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
            JOIN pg_class t ON d.refclassid = 'pg_class'::regclass AND d.refobjid = t.oid
            WHERE r.ev_class = :oid AND t.relkind = 'r' LIMIT 1"""
        table: str | None = connection.scalar(text(query), {"oid": _oid(connection, view)})
        return table
    query = "SELECT sql FROM sqlite_master WHERE type = 'view' AND lower(name) = lower(:name)"
    statement: str | None = connection.scalar(text(query), {"name": view.name})
    if statement is None:
        return None
    source = statement.rpartition(" FROM ")[2].strip()
    return source[1:-1].replace('""', '"') if source.startswith('"') else source


def protect(connection: Connection, view: View) -> None:
    """Make the database refuse writes to the view, in words that say what to do.

    To PostgreSQL a view as simple as this one is writable. SQLite refuses it by itself, but not with RETURNING. The
    triggers cost nothing: they are no part of what a query is rewritten to.
    """
    if connection.dialect.name != "postgresql":
        _protect_on_sqlite(connection, view)
        return
    if (oid := _oid(connection, view)) is None:
        return
    there = set(connection.scalars(text("SELECT tgname FROM pg_trigger WHERE tgrelid = :oid"), {"oid": oid}))
    missing = [name for name in _TRIGGERS if name not in there]
    if missing and connection.scalar(text("SELECT to_regproc(:name)"), {"name": REFUSE}) is None:
        execute(connection, _FUNCTION)
    for name in missing:
        made = _TRIGGERS[name].format(view=view.sql)
        execute(connection, f"CREATE TRIGGER {name} {made} EXECUTE FUNCTION {REFUSE}()")


def _protect_on_sqlite(connection: Connection, view: View) -> None:
    if not exists(connection, view) or any(_sqlite_triggers(connection, view, own=own) for own in (True, False)):
        return
    words = f"{view} {READ_ONLY}".replace("'", "''")
    for event in ("INSERT", "UPDATE", "DELETE"):
        name = quoted(f"{_READ_ONLY}_{event.lower()}_{view.name}")
        execute(
            connection,
            f"CREATE TRIGGER {name} INSTEAD OF {event} ON {view.sql} BEGIN SELECT RAISE(ABORT, '{words}'); END",
        )


def lock(connection: Connection, views: Iterable[View]) -> None:
    """Lock views for their replacement, in an order that is the same for everyone.

    Raises:
        sqlalchemy.exc.OperationalError: a transaction that has read a view is still open.
    """
    if connection.dialect.name == "postgresql":
        for view in sorted(views, key=str):
            if _oid(connection, view) is not None:
                # it takes the view's lock and changes nothing; LOCK TABLE would lock the table behind the view, too
                execute(connection, f"ALTER VIEW {view.sql} RESET (check_option)")


_READERS = """
SELECT DISTINCT a.pid, a.application_name, a.state, extract(epoch FROM now() - a.xact_start)::int AS seconds
FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.relation = :oid AND l.pid <> pg_backend_pid() ORDER BY a.pid"""


def readers(connection: Connection, view: View) -> list[str]:
    """Return a description of each session that holds a lock on the view (PostgreSQL)."""
    if connection.dialect.name != "postgresql":
        return []
    return [
        f"process {row.pid} ({row.application_name or 'no application_name'}, {row.state}, for {row.seconds} s)"
        for row in connection.execute(text(_READERS), {"oid": _oid(connection, view)})
    ]

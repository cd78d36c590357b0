"""The dashboard: see and steer the jobs of a namespace, in the app that is there already.

::

    app.register_blueprint(create_dashboard(mlq, auth=...), url_prefix="/dashboard")

A second blueprint beside that of the HTTP interface, with the same ``auth=``. Every page is made here, from the store,
and is whole without JavaScript: links, forms, tables, charts. Where there is JavaScript the same page is fetched again
and what has changed in it is changed in place; a job's page hears of its job by server-sent events. Nothing comes from
outside, and the policy of the pages allows no script or style that stands in a page itself.
"""

from __future__ import annotations

from .blueprint import create_dashboard

__all__ = ["create_dashboard"]

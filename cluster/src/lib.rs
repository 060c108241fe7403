//! How a process joins, reports and leaves; shared process start-up.

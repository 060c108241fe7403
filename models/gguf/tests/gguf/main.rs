//! Files that are right open, and files that lie are refused with one line that names the file and the field.

mod config;
mod header;
mod split;
mod writer;

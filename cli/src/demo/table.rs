//! The table of times: a row a step, a column a backend.

use std::io::{self, Write};

use super::Column;

pub(super) struct Table {
    columns: Vec<(String, Column)>,
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            columns: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, name: &str, column: Column) {
        self.columns.push((name.to_owned(), column));
    }

    /// Prints it; every column has the same steps.
    pub(super) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let Some((_, first)) = self.columns.first() else {
            return Ok(());
        };
        let label = first.iter().map(|(step, _)| step.len()).max().unwrap_or(0);
        let cells = self.columns.iter().flat_map(|(name, column)| {
            let cells = column.iter().map(|(_, cell)| cell.len());
            cells.chain([name.len()])
        });
        let width = cells.max().unwrap_or(0);
        write!(out, "{:label$}", "")?;
        for (name, _) in &self.columns {
            write!(out, "  {name:>width$}")?;
        }
        writeln!(out)?;
        for (row, (step, _)) in first.iter().enumerate() {
            write!(out, "{step:label$}")?;
            for (_, column) in &self.columns {
                let cell = column.get(row).map_or("", |(_, cell)| cell);
                write!(out, "  {cell:>width$}")?;
            }
            writeln!(out)?;
        }
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new();
        table.add(
            "copy",
            vec![("boot", "7.00 ms".into()), ("a long step", "1 MiB".into())],
        );
        table.add(
            "qcow2",
            vec![("boot", "8.50 ms".into()), ("a long step", "12 MiB".into())],
        );
        let mut out = Vec::new();
        table.print(&mut out).unwrap();
        let expected = "\
             \x20               copy    qcow2\n\
             boot         7.00 ms  8.50 ms\n\
             a long step    1 MiB   12 MiB\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}

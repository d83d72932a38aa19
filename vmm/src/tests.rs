//! Machines made from the pieces by hand, running a few hand-assembled instructions.

mod bare;
